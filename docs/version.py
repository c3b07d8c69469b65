"""The version in the header of every page (a hook of MkDocs)."""

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Add the version of pyproject.toml to the site's name."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    config.site_name += " " + re.findall(r'^version = "(.*)"', text, re.MULTILINE)[0]
    return config
