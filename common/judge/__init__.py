"""Language models as judges: the run's own base model, another model, or a server (`rewards.<name>.judge`)."""
