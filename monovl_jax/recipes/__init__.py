"""The papers' training recipes, as lists of stages. A variant is `dataclasses.replace`."""
