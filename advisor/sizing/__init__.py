"""The biggest model of each family that fits the memory and meets the times asked for."""
