"""Configuration of scripts and commands: dataclasses, filled from files and flags."""
