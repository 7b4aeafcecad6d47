"""Rollouts: who writes the responses, and the engines that write for the student."""
