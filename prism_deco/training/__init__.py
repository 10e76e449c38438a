"""Training: from the configuration to a finished run folder."""
