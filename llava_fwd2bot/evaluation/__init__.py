"""The evaluators behind `fwd2bot eval`, official scorers, and classes for lmms-eval and VLMEvalKit."""
