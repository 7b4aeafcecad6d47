"""Rollouts, which write the responses, and the inference engines that generate for the student."""
