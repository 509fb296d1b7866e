"""The standing attack: programs that anyone can run, and their short forms as tests."""

import argparse


def at_least_one(text: str) -> int:
    """Return the number of an option that counts tries; without a try nothing would be shown."""
    if not text.isdecimal() or text == "0":
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text}")
    return int(text)
