"""How a report says its figures: names, numbers, findings and verdicts."""
