"""Measuring real blocks on the machine at hand. The one corner of `profiles` that imports torch."""
