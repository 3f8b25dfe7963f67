"""What tests and benchmarks share: the rule of accuracy, timing, and each op's inputs and cases."""
