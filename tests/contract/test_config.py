"""Settings are strict, and an error says where, what, and what instead, in one line."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from alignbench.config import Config, UserError, decode, load_yaml, merge, parse_assignment, parse_yaml, put, settings


class Inner(Config):
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0


class Outer(Config):
    name = "outer"
    count: int
    inner: Inner = Inner()
    mode: Literal["full", "lora"] = "full"
    flag: bool = False
    maybe: Inner | None = None
    word: Annotated[str, Meta(pattern=r"^[a-z]+\Z", description="letters")] = "a"
    many: dict[str, list[int]] = msgspec.field(default_factory=dict)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"count": 1, "iner": {}}, "x: base.iner: outer has no such setting; did you mean 'inner'? (settings: "),
        ({"count": 1, "inner": {"lrr": 1}}, "x: base.inner.lrr: inner has no such setting; did you mean 'lr'?"),
        ({"count": 1, "maybe": {"warm": 1}}, "x: base.maybe.warm: inner has no such setting; did you mean 'warmup'?"),
        ({"count": 1.0}, "x: base.count: expected a whole number, got float (1.0)"),
        ({"count": "1"}, "x: base.count: expected a whole number, got text ('1')"),
        ({"count": True}, "x: base.count: expected a whole number, got true or false (True)"),
        ({"count": 1, "flag": "true"}, "x: base.flag: expected true or false, got text ('true')"),
        ({"count": 1, "inner": {"lr": "1e-5"}}, "x: base.inner.lr: expected float, got text ('1e-5')"),
        ({"count": 1, "inner": {"betas": [0.9, "b"]}}, "x: base.inner.betas[1]: expected float, got text ('b')"),
        ({"count": 1, "inner": {"lr": float("nan")}}, "x: base.inner.lr: nan is not a number"),
        ({"count": 10**40}, "x: base.count: a whole number of 133 bits"),
        ({"count": 1, "inner": {"\ud800": 1}}, "x: base.inner: '\\ud800' holds half of a surrogate pair"),
        (
            {"count": 1, "word": 5},
            "x: base.word: expected text, got a whole number (5); choose letters; put it in quotes",
        ),
        ({"count": 1, "word": "a\n"}, "x: base.word: wrong form ('a\\n'); choose letters"),
        ({"count": 1, "many": {"a": [], "b.c": [1, "x"]}}, "x: base.many.b.c[1]: expected a whole number, got text"),
        ({"count": 1, "mode": "lorra"}, "x: base.mode: invalid enum value 'lorra' ('lorra'); choose one of full, lora"),
        ({}, "x: base: 'count' is missing"),
        ([], "x: base: expected settings (key: value), got a list"),
    ],
)
def test_wrong_settings_are_one_line_with_the_full_path(data: Any, line: str) -> None:
    """A typo, a wrong type, a missing key: each names its place and what would be right."""
    with pytest.raises(UserError) as error:
        decode(Outer, data, "x: base")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_whole_number_is_a_float() -> None:
    """``lr: 1`` and ``lr: 1.0`` are the same setting, so that they make the same id."""
    assert settings(decode(Outer, {"count": 1, "inner": {"lr": 1}}, "")) == settings(
        decode(Outer, {"count": 1, "inner": {"lr": 1.0}}, "")
    )


def test_settings_are_complete_and_named() -> None:
    """Settings as plain data include every default, and the name by which the class is chosen."""
    plain = settings(decode(Outer, {"count": 3}, ""))
    assert plain["name"] == "outer"
    assert plain["inner"] == {"lr": 1e-5, "betas": [0.9, 0.999], "warmup": 0}


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "+1e-5", ".1e-4"])
def test_scientific_notation_is_a_number(text: str) -> None:
    """PyYAML alone reads ``1e-5`` as text."""
    assert parse_yaml(f"lr: {text}", "x")["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3", "x:3: the key 'a' is already set on line 1"),
        ("top:\n  a: 1\n  a: 2", "x:3: the key 'a' is already set on line 2"),
        ("a: [1, 2", "x:1: "),
        ("a:\n  b: 1\n c: 2", "x:3: "),
        ("1: a", "x:1: the key 1 is not text"),
        ("a: !!python/object/apply:os.system ['true']", "x:1: could not determine a constructor"),
        ("a: &x [1, *x]", "x:1: the alias *x stands inside of what it refers to"),
        ("a: 1\nb: &x {c: {d: *x}}", "x:2: the alias *x stands inside of what it refers to"),
        ("a: " + 3000 * "[", "x:1: brackets or settings are nested more than 50 deep"),
        ("a: 1\nb: !!int many", "x:2: 'many' is not a value of the type int"),
        ("a: !!bool maybe", "x:1: 'maybe' is not a value of the type bool"),
        ("a: !!set {b}", "x:1: could not determine a constructor"),
        ("a: 1\nb: " + 5000 * "9", "x:2: '99999999999999999999...' is not a value of the type int"),
        ("a: 1\nb: \0", "x:2: the character U+0000 is not text"),
        ("? [a]\n: 1", "x:1: the key like this is not text"),
    ],
)
def test_bad_yaml_names_file_and_line(text: str, line: str) -> None:
    """A syntax error or a key given twice is one line with its number; no Python object is ever made."""
    with pytest.raises(UserError) as error:
        parse_yaml(text, "x")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:00:00", "12:00:00"), ("1:30", "1:30"), ("1:30:00.5", "1:30:00.5"), ("120:00:00", "120:00:00"),
        ("7-00", "7-00"), ("2026-12-01", "2026-12-01"), ("2026-13-45", "2026-13-45"), ("010", "010"), ("no", "no"),
        ("on", "on"), ("Y", "Y"), ("0o17", "0o17"), ("=", "="), ("1_", "1_"), ("\u0663", "\u0663"),
        ("16G", "16G"), ("1_000", 1000), ("0x1F", 31), ("-3", -3), ("+.5", 0.5), ("1.", 1.0), ("1e3", 1000.0),
        ("True", True), ("false", False), ("~", None), ("", None), ("null", None),
    ],
)  # fmt: skip
def test_nothing_is_read_as_something_else(text: str, value: Any) -> None:
    """A value of YAML 1.1's own (base 60, octal, dates, yes and no) is text; what 1.1 and 1.2 share is as in both."""
    (read,) = parse_yaml(f"a: {text}", "x").values()
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("level", ["[*a{0}, *a{0}, *a{0}, *a{0}]", "{{<<: [*a{0}, *a{0}, *a{0}, *a{0}]}}"])
def test_a_bomb_of_aliases_is_named(level: str) -> None:
    """Aliases that repeat each other are counted before they are written out; the error names the line."""
    lines = ["a0: &a0 {k: 1}", *(f"a{i + 1}: &a{i + 1} {level.format(i)}" for i in range(40))]
    with pytest.raises(UserError, match=r"^x:9: aliases repeat this into more than 100,000 settings"):
        parse_yaml("\n".join(lines), "x")


def test_aliases_and_merge_keys_are_what_yaml_says() -> None:
    """An alias is the same value; a merged mapping gives what the mapping itself does not set, at any depth."""
    text = "a: &a {p: 1, q: 2}\nb: {c: &c {<<: *a, p: 3}}\nd: {<<: *c, q: 4}\ne: *a"
    assert parse_yaml(text, "x") == {
        "a": {"p": 1, "q": 2}, "b": {"c": {"p": 3, "q": 2}}, "d": {"p": 3, "q": 4}, "e": {"p": 1, "q": 2},
    }  # fmt: skip


def test_a_file_can_extend_another(tmp_path) -> None:
    """``extends`` overlays key by key, relative to the file; lists are replaced, and a cycle is an error."""
    (tmp_path / "a.yaml").write_text("x: {p: 1, q: 2}\ny: [1, 2]")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nx: {q: 3}\ny: [4]")
    assert load_yaml(tmp_path / "b.yaml") == {"x": {"p": 1, "q": 3}, "y": [4]}
    (tmp_path / "c.yaml").write_text("extends: packed\nz: 1")
    assert load_yaml(tmp_path / "c.yaml", {"packed": tmp_path / "a.yaml"})["z"] == 1
    (tmp_path / "c.yaml").write_text("extends: pakced")
    with pytest.raises(UserError, match="did you mean 'packed'"):
        load_yaml(tmp_path / "c.yaml", {"packed": tmp_path / "a.yaml"})
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load_yaml(tmp_path / "b.yaml")


def test_a_key_with_a_plus_appends_to_the_inherited_list(tmp_path) -> None:
    """``y+: [...]`` follows the items of the file that is extended, at any depth; without a list it is refused."""
    (tmp_path / "a.yaml").write_text("x: {p: [1]}\ny: [1, 2]\nz: 1")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nx: {p+: [2]}\ny+: [3]")
    assert load_yaml(tmp_path / "b.yaml") == {"x": {"p": [1, 2]}, "y": [1, 2, 3], "z": 1}
    for line in ("z+: [1]", "w+: [1]", "y+: 3", "y+: [3]\ny: [4]", "x: {q+: [1]}"):
        (tmp_path / "b.yaml").write_text(f"extends: a.yaml\n{line}")
        with pytest.raises(UserError, match=r"b\.yaml: (x\.)?\w\+: appends to an inherited list '\w', and "):
            load_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize("parent", ["[a.yaml]", "{a: 1}", "3", "null", "''"])
def test_a_sweep_extends_one_file(tmp_path, parent) -> None:
    """A list of files, or anything else that is not a name, is refused."""
    (tmp_path / "b.yaml").write_text(f"extends: {parent}")
    with pytest.raises(UserError, match=r"b\.yaml: extends: .* is not the name of a file"):
        load_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"- a\n- b", b"", None])
def test_a_file_without_settings_is_named(tmp_path, content) -> None:
    """A file that is not UTF-8, holds a list or nothing, or is absent gives one line with its name."""
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^.*a\.yaml: "):
        load_yaml(path)


def test_dotted_assignments() -> None:
    """``a.b[1].c=1e-3`` is read as YAML and changes a copy."""
    path, value = parse_assignment("a.b[1].c=1e-3")
    before = {"a": {"b": [1, {"c": 2}]}}
    assert put(before, path, value, "x") == {"a": {"b": [1, {"c": 1e-3}]}}
    assert before == {"a": {"b": [1, {"c": 2}]}}
    assert put({}, "a.b", 1, "x") == {"a": {"b": 1}}
    for bad in ("a", "=1", "a b=1", "a.=1"):
        with pytest.raises(UserError, match="is not of the form"):
            parse_assignment(bad)
    with pytest.raises(UserError, match="no item"):
        put(before, "a.b[7]", 1, "x")


def test_merge_keeps_what_is_not_named() -> None:
    """Merging goes into nested settings and does not change its arguments."""
    base = {"a": {"x": 1, "y": 2}}
    assert merge(base, {"a": {"y": 3}, "b": 4}) == {"a": {"x": 1, "y": 3}, "b": 4}
    assert base == {"a": {"x": 1, "y": 2}}
