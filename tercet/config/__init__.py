"""The configuration: one file a section, every field with its one default and its explanation."""

from tercet.config.load import Config, commented_yaml, load_config, parse_yaml, to_yaml

__all__ = ["Config", "commented_yaml", "load_config", "parse_yaml", "to_yaml"]
