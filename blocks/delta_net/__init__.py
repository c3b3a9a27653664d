"""DeltaNet: linear attention that corrects what it has stored instead of adding to it."""
