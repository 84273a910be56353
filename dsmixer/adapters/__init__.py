"""Experts on disk: PEFT adapter folders in and out, and the mixture folder that holds them."""
