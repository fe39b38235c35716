"""A plan of CQS attention for a reader: text, pictures, and the demonstration of the paper."""
