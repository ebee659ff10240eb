"""Runs before the program's own modules are set up, so that the pack finds what it says here."""

import os

os.environ["SAMPLE_PRESTARTUP"] = f"{os.environ.get('SAMPLE_PRESTARTUP', '')}ran "
