import base64
import json
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from prefect_rollout.text import (
    address,
    cell,
    id_in,
    json_line,
    link,
    markdown,
    masked,
    one_line,
    shown_address,
)


def test_chinese_stays_as_it_is() -> None:
    assert one_line("配额不足，请联系管理员") == "配额不足，请联系管理员"


@given(st.text())
def test_no_text_steers_a_terminal_or_breaks_a_line(text: str) -> None:
    assert all(char.isprintable() for char in one_line(text))


@given(st.text(max_size=3000), st.integers(2, 400))
def test_no_text_grows_beyond_its_limit(text: str, limit: int) -> None:
    assert len(one_line(text, limit)) <= limit


def test_a_cut_shows() -> None:
    assert one_line("x" * 400, 10) == "xxxxxxxxx…"
    assert one_line("a" * 10 + " " * 5000, 10).startswith("aaaaaaaaa")


def test_escape_sequences_and_direction_marks_are_taken_out() -> None:
    assert one_line("a\x1b[31mb\u202ec\x00") == "a�[31mb�c�"


@given(st.text(alphabet="<>&*_`[]()#|\\!~+-. \nahtps:/w@", max_size=60))
@example("http://a.com www.a.com a@a.com //a.com a.com ftp://a.com")
def test_no_text_becomes_markup_in_a_table_cell(text: str) -> None:
    table = f"| head |\n| --- |\n| x{markdown(text)} |\n"
    html = MarkdownIt("gfm-like", {"html": True}).render(table)
    body = html.split("<tbody>")[1].replace("<code>", "").replace("</code>", "")
    assert body.count("<") == len(["<tr>", "<td>", "</td>", "</tr>", "</tbody>", "</table>"])


def test_an_address_is_shown_and_leads_nowhere() -> None:
    assert markdown("see http://a.b/c|d, or www.a.b!") == r"see `http://a.b/c`\|d, or `www.a.b!`"
    assert markdown("harbor.qihoo.net/x_y:1.2") == r"harbor\.qihoo\.net/x\_y:1\.2"


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@example("\x1b[31m\x9b2J\u202e\u2028\x85\U000e0001\ud800")
def test_json_is_one_line_that_steers_no_terminal_and_keeps_the_data(value: object) -> None:
    line = json_line(value)
    assert line.isprintable()
    assert json.loads(line) == value


def test_json_keeps_chinese_readable() -> None:
    assert json_line({"reason": "首次发布"}) == '{"reason": "首次发布"}'


SECRET = 'é/+" %密s3cretS3cret'


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        json.dumps(SECRET),
        json.dumps(SECRET, ensure_ascii=False),
        quote(SECRET),
        quote(SECRET, safe=""),
        quote_plus(SECRET),
        quote(SECRET).lower(),
        SECRET.encode().hex(),
    ],
)
def test_a_secret_is_masked_in_each_form(form: str) -> None:
    shown = masked(f"before {form} after", ["other", SECRET])
    assert "s3cret" not in shown
    assert SECRET.encode().hex() not in shown
    assert "********" in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")


@pytest.mark.parametrize("around", ["", "x", "xy", "xyz"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_secret_is_masked_in_base64_wherever_it_begins(around: str, encode: Any) -> None:
    text = encode(f"{around}{SECRET}{around}".encode()).decode()
    shown = masked(text, [SECRET])
    assert "********" in shown
    assert len(shown.replace("********", "")) <= 4 * (2 * len(around) + 3)


def test_a_key_id_within_the_secret_leaves_nothing_of_it() -> None:
    assert masked("a key-and-more b", ["key", "key-and-more"]) == "a ******** b"


def test_nothing_is_masked_where_nothing_is_secret() -> None:
    assert masked("配额不足", ["", "s3cret"]) == "配额不足"


@pytest.mark.parametrize(
    "text", ["- x", "-", "---", "- - -", "1. x", "12.", "-x", "1.5", "* x", "+ x", "# x"]
)
def test_a_cell_begins_no_list_and_no_rule(text: str) -> None:
    assert MarkdownIt("gfm-like").render(cell(text)).strip() == f"<p>{text}</p>"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://prefect.example/api", "https://prefect.example/api"),
        ("http://me:pass@prefect.example:4200/api", "http://prefect.example:4200/api"),
        ("https://me@prefect.example", "https://prefect.example"),
        ("https://me:p@ss@prefect.example/a@b", "https://prefect.example/a@b"),
        ("https://prefect.example/api?token=pass#pass", "https://prefect.example/api"),
        ("HTTPS://me:pass@Prefect.example", "https://Prefect.example"),
        ("http://[::1]:4200/api", "http://[::1]:4200/api"),
        ("http://me:pa/ss@prefect.example", ""),
        ("me:pass@prefect.example/api", ""),
        ("javascript:alert(1)", ""),
        ("javascript://me:pass@x/%0aalert(1)", ""),
        ("data:text/html,x", ""),
        ("ftp://me:pass@prefect.example", ""),
        ("//me:pass@prefect.example", ""),
        ("http://", ""),
        ("http://host\\@evil.example", ""),
        ("http://host\n.example", ""),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_what_nobody_may_read(url: str, shown: str) -> None:
    assert address(url) == shown
    assert "pass" not in shown_address(url)
    assert ("](" in link("Page", url)) is bool(shown)
    assert "pass" not in link("Page", url)


def test_no_text_shows_the_user_and_password_of_an_address() -> None:
    quoted = "Client error '401' for url 'http://me:pass@host:1/api/x' and postgresql+asyncpg://a:pass@b"
    assert one_line(quoted) == "Client error '401' for url 'http://host:1/api/x' and postgresql+asyncpg://b"
    assert "pass" not in markdown(quoted) + cell(quoted)
    image = "see https://host/a@sha256:1 and r/web@sha256:2"
    assert one_line(image) == image


@pytest.mark.parametrize(
    "around", ["{}", " {}\n", "http://prefect/runs/flow-run/{}/", "https://p/run/{}?tab=Logs#x"]
)
def test_a_link_of_a_run_is_its_id(around: str) -> None:
    assert id_in(around.format("6F1C0B9E-8363")) == "6f1c0b9e-8363"
