import pytest

from prefect_rollout.errors import InputError
from prefect_rollout.release import newest as module
from prefect_rollout.release.image_errors import ImageNotFoundError
from prefect_rollout.release.newest import Newest, newest
from prefect_rollout.release.request import NewestPolicy

WEB = "registry.example/shop/web"


def choose(tags: list[str], **policy: object) -> Newest:
    """Return the choice; the order of the registry must not matter."""
    made = NewestPolicy.of(**policy)
    found = newest(made, tags, repository=WEB)
    assert newest(made, tags[::-1], repository=WEB).tag == found.tag
    return found


@pytest.mark.parametrize(
    ("policy", "tag"),
    [
        ({}, "v3.0.0"),
        ({"range": "^1.2"}, "1.10.0"),
        ({"range": "~1.2"}, "1.2.9"),
        ({"range": "1.x"}, "1.10.0"),
        ({"range": ">=1.0, <1.10"}, "1.2.9"),
        ({"range": ">=1.0 <1.10"}, "1.2.9"),
        ({"range": "~1.2 || ^2"}, "2.0.0"),
        ({"range": "1.2 - 1.4"}, "1.2.9"),
        ({"range": "^1.2", "prereleases": True}, "1.11.0-rc.1"),
        ({"prereleases": True}, "4.0.0-alpha"),
        ({"range": "<2", "prereleases": True}, "1.11.0-rc.1"),
        ({"pattern": r"^(\d+\.\d+\.\d+)-alpine$", "extract": "$1"}, "1.3.0-alpine"),
    ],
)
def test_the_highest_version_of_the_range_wins(policy: dict[str, object], tag: str) -> None:
    tags = ["1.2.9", "1.2.10-rc.1", "1.10.0", "1.9", "2.0.0", "v3.0.0", "latest", "1.11.0-rc.1"]
    tags += ["4.0.0-alpha", "1.3.0-alpine", "main-12"]
    assert choose(tags, **policy).tag == tag


@pytest.mark.parametrize(
    ("tags", "policy", "tag"),
    [
        (["9", "10", "latest"], {}, "10"),
        (
            ["202407291835-ddc95a7", "202407300001-0000000", "202312312359-fffffff", "latest"],
            {"pattern": "^([0-9]{12})-[0-9a-f]{7}$", "extract": "$1"},
            "202407300001-0000000",
        ),
        (["20190209-4", "20190209-22"], {}, "20190209-22"),  # fluxcd/image-reflector-controller#340
        (
            ["main-9-abc", "main-10-abc", "dev-11-abc"],
            {"pattern": "^main-(?P<n>[0-9]+)", "extract": "${n}"},
            "main-10-abc",
        ),
        (["a1b2", "a1b10"], {"pattern": r"a(\d)b(\d+)", "extract": "$1.$2"}, "a1b10"),
        (["9007199254740993", "9007199254740992"], {}, "9007199254740993"),  # equal as floating point
    ],
)
def test_the_highest_number_wins(tags: list[str], policy: dict[str, object], tag: str) -> None:
    assert choose(tags, by="numerical", **policy).tag == tag


def test_the_last_in_the_alphabet_wins() -> None:
    assert choose(["9", "10", "2024-07"], by="alphabetical").tag == "9"
    assert choose(["b-2", "a-3"], by="alphabetical", pattern="-(.)", extract="$1").tag == "a-3"


def test_equal_tags_are_chosen_the_same_way_whatever_the_order() -> None:
    assert choose(["1.2.3", "v1.2.3"]).tag == "v1.2.3"


def test_the_choice_says_which_tags_were_considered_and_why_the_others_were_not() -> None:
    policy = NewestPolicy(range="^1.2")
    tags = ["1.2.0", "1.2.1", "1.3.0-rc.1", "1.4.0", "2.0.0", "latest", "nightly"]
    found = newest(policy, tags, repository=WEB, failed={"1.4.0": "CrashLoopBackOff"})
    assert found.why(policy) == (
        "1.2.1 is the highest version in ^1.2, of 2 such tags; next: 1.2.0. Left out: 1 are pre-releases: "
        "1.3.0-rc.1; 1 failed before (CrashLoopBackOff): 1.4.0; 1 are outside ^1.2: 2.0.0; "
        "2 are no versions: nightly, latest"
    )


def test_a_long_list_is_counted() -> None:
    policy = NewestPolicy(by="numerical")
    found = newest(policy, [*map(str, range(2000)), *(f"x{n}" for n in range(300))], repository=WEB)
    assert found.why(policy) == (
        "1999 is the highest number, of 2000 such tags; next: 1998, 1997, 1996, 1995 and 1995 more. "
        "Left out: 300 are no numbers: x99, x98, x97, x96, x95 and 295 more"
    )


def test_pre_releases_that_are_compared_as_text_are_told() -> None:  # fluxcd/flux2#4599
    policy = NewestPolicy(prereleases=True)
    found = newest(policy, ["1.0.0-rc9", "1.0.0-rc10"], repository=WEB)
    assert found.tag == "1.0.0-rc9"
    assert "name them rc.9 and rc.10" in found.why(policy)
    assert newest(policy, ["1.0.0-rc.9", "1.0.0-rc.10"], repository=WEB).tag == "1.0.0-rc.10"
    assert newest(policy, ["1.0.0-rc.9", "1.0.0-rc.10"], repository=WEB).notes == ()


@pytest.mark.parametrize(
    ("tags", "why"),
    [([], "has no tags"), (["latest"], "1 are no versions: latest"), (["1.0.0-rc.1"], "1 are pre-releases")],
)
def test_no_fitting_tag_is_an_error_that_says_why(tags: list[str], why: str) -> None:
    with pytest.raises(ImageNotFoundError, match=f"no tag of {WEB} is the highest version.*{why}"):
        newest(NewestPolicy(), tags, repository=WEB)


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ({"range": "latest"}, "range: .*no range of versions"),
        ({"range": ">=1.0 nonsense"}, "no range"),
        ({"range": " "}, "no range"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "(a)", "extract": "$2"}, "has no group 2"),
        ({"pattern": "(?P<n>a)", "extract": "$nx"}, "has no group nx; write"),
        ({"by": "numerical", "range": "^1"}, "needs by: semver"),
        ({"by": "alphabetical", "prereleases": True}, "needs by: semver"),
        ({"by": "date"}, "by"),
        ({"regex": "x"}, "regex"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(policy: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        NewestPolicy.of(**policy)


def test_a_pattern_cannot_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATTERN_SECONDS", 0.05)
    policy = NewestPolicy(by="alphabetical", pattern="(.*a){20}b")
    with pytest.raises(ImageNotFoundError, match="takes too long"):
        newest(policy, ["a" * 120], repository=WEB)


def test_foreign_tags_are_shown_as_data() -> None:
    policy = NewestPolicy(by="alphabetical")
    assert "\x1b" not in newest(policy, ["\x1b[31mred", "a"], repository=WEB).why(policy)
