"""What each stage needs around its training loop."""
