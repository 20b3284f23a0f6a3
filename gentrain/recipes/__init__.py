"""Recipes: ordered stages with named outputs; what is finished is skipped, what is interrupted resumes."""
