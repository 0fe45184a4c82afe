"""Inputs that nobody should have made: damaged and forged files, each case under limits of time and memory."""
