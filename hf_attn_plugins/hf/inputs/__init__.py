"""What a command is given: a model by name, a text, a message for a chat template."""
