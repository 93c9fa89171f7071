"""Ranks: which one this process is, and how they meet, agree and share what they read."""
