"""`python -m ultrafuser` is the command `ultrafuser`: what launchers of several processes need."""

from ultrafuser.cli.main import run

run()
