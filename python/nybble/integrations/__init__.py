"""Integrations of nybble into other frameworks."""


def _needs(integration: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Returns the error of an integration whose framework is missing, with the extra that installs it."""
    missing = (error.name or integration).partition(".")[0]
    extra = integration.replace("_", "-")
    return ModuleNotFoundError(
        f"nybble.integrations.{integration} needs {missing}: pip install 'nybble[{extra}]'", name=missing
    )
