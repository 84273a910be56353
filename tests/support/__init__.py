"""What several tests need: tiny models and domains, launching under DeepSpeed, comparing runs."""
