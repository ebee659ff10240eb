"""Whether importing `comfy.cli_args` reads the command line (tools that embed the library leave it off)."""

args_parsing = False


def enable_args_parsing(enable: bool = True) -> None:
    """Make the first import of `comfy.cli_args` parse `sys.argv`."""
    global args_parsing
    args_parsing = enable
