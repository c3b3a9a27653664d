"""What the user wants: the workload, the rules, the size, and what would change the answer. Never imports torch."""
