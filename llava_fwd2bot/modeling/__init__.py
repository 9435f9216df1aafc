"""What the mixin is made of: adapters, attaching and detaching, the objective, generation."""
