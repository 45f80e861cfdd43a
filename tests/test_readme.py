"""README.md says what is true: its code runs, its commands parse, its numbers come from the saved runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fqtstats.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def readme_module(analysis):
    return analysis("readme")


def test_generated_text_is_that_of_the_saved_runs(readme_module) -> None:
    assert readme_module.render(README) == README


def test_changed_numbers_would_be_noticed(readme_module) -> None:
    output = re.search(r"<!-- output:.*?<!-- end of output -->", README, re.DOTALL)
    assert output is not None
    digit = re.search(r"\d\.\d\de-\d\d", output[0])
    assert digit is not None
    assert readme_module.render(README.replace(digit[0], "9.99e-99")) == README


def test_the_saved_runs_are_those_of_the_commands(readme_module) -> None:
    from fqtstats.results import load

    for name, command in readme_module.COMMANDS.items():
        assert command in README
        stored = load(ROOT / "analysis" / "results" / name).metadata["arguments"]
        words = shlex.split(command)
        labels = [
            f"{q}@{b}"
            for q in words[words.index("--quantizer") + 1].split(",")
            for b in (words[words.index("--bits") + 1] if "--bits" in words else "5").split(",")
        ]
        assert isinstance(stored, dict)
        assert stored["quantizers"] == labels


def test_every_command_parses() -> None:
    command = get_command(app)
    lines = [line.split("&&")[-1].strip() for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(fqtstats [^`]+)`", README)
    lines += [line for block in blocks("yaml") for line in re.findall(r"- run: (fqtstats .+)", block)]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("fqtstats ")]
    assert len(commands) >= 5
    for _, name, *arguments in commands:
        subcommand = command.commands[name]  # type: ignore[attr-defined]
        subcommand.make_context(name, [a for a in arguments if a != "--help"])


def test_the_two_commands_are_there() -> None:
    commands = blocks("bash")[0].splitlines()
    assert commands == [
        "pip install -c constraints.txt . && fqtstats measure --quantizer bhq",
        'pip install -c constraints.txt ".[test]" && pytest',
    ]


def test_the_users_own_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (code,) = blocks("python")
    statements = code[code.index("model =") :].strip().splitlines()
    assert len(statements) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "bias_p" in capsys.readouterr().out
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


def test_the_users_own_quantizer_is_a_policy() -> None:
    import small

    import fqtstats

    assert "`fqtstats.policies.with_gradients(f)`" in README

    def to_eighths(x, stream):
        return (8 * x + stream.uniform(x.shape)).floor() / 8

    policy = fqtstats.policies.with_gradients(to_eighths)
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, draws=4)
    assert result.total()["variance"] > 0
    assert fqtstats.check_unbiased(to_eighths, small.batch()[0]).ok


def test_links_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
