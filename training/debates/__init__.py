"""Debates: personas, answerers (local model or server), debate, moderator, judge."""
