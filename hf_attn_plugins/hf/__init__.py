"""What stands between the methods and Hugging Face Transformers."""
