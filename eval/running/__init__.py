"""What a run does with a model: prompts, answers and measurements."""
