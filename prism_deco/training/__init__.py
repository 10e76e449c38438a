"""Training: the configuration becomes a model, the model a run folder."""
