"""`repquant-fx completion`: print what makes a shell complete commands, options and their values.

    eval "$(repquant-fx completion bash)"            # in ~/.bashrc; zsh in ~/.zshrc
    repquant-fx completion fish | source             # in ~/.config/fish/config.fish
"""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


def add(command: argparse.ArgumentParser) -> None:
    """The options of `completion`."""
    command.set_defaults(run=run)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description = (command.description or "") + "\n\n" + (__doc__ or "").split("\n\n", 1)[1].rstrip()
    command.add_argument("shell", choices=SHELLS)


def run(options: argparse.Namespace) -> int:
    """Print the shell's code; returns the exit code."""
    import argcomplete

    print(argcomplete.shellcode(["repquant-fx"], shell=options.shell))
    return 0
