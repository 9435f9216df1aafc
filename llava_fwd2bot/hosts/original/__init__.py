"""The original LLaVA's research code (package `llava`): its models, and its own programs with Fwd2Bot."""
