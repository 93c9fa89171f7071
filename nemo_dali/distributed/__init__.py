"""Ranks: which one this is, how they meet, agree and share what is read."""
