"""What gates do to networks that were trained on ImageNet: right after insertion, and while they are fine-tuned."""
