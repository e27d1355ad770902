"""`python -m jaxrmils` is the `jaxrmils` command."""

from jaxrmils.cli.main import entry_point

entry_point()
