"""Mixture of experts: a channel mixer of which each token uses a part."""
