"""What every folder uses: files from outside, checked fields, locks, the machine, messages."""

VERSION = "0.1.0"
