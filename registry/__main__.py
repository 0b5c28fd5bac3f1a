"""`python -m registry`: the registry's command line."""

from registry.cli import app

if __name__ == "__main__":
    app()
