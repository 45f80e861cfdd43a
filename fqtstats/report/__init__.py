"""Tables and figures; they read results only, never a model."""
