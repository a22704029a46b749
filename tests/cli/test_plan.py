"""`hvfuse plan`: what is refused, and how it is said."""

from __future__ import annotations

from .conftest import CommandLine

PLAN = """\
[[plan.site.group]]
name = "databases"
vms = ["db01", "db02"]
pause = "look"
"""


def test_what_makes_no_sense_is_refused(hvfuse: CommandLine) -> None:
    (hvfuse.root / "hvfuse.toml").write_text(PLAN)
    for words, code in (
        (("run", "nosuch", "--test"), 5),
        (("run", "site", "--test", "--kind", "planned"), 2),
        (("run", "site", "--continue", "--skip"), 2),
        (("run", "site", "--continue", "--point", "latest"), 2),
        (("run", "site", "--skip", "--test"), 2),
        (("run", "site", "--kind", "planned", "--point", "latest"), 2),
        (("run", "site", "--continue"), 13),
        (("show", "nosuch"), 5),
        (("report", "site"), 5),
        (("report", "site", "4"), 5),
        (("cancel", "site"), 5),
    ):
        assert hvfuse("plan", *words, "--json") == code, (words, hvfuse.err)
    assert hvfuse.json("plan", "cleanup", "site") == {"plan": "site", "cleaned": []}


def test_the_vms_are_named_before_any_is_failed_over_and_nobody_means_no(hvfuse: CommandLine) -> None:
    (hvfuse.root / "hvfuse.toml").write_text(PLAN)
    assert hvfuse("plan", "run", "site", "--kind", "planned") == 2
    assert "this fails 2 VMs over, planned: db01, db02" in hvfuse.err
    assert "hvfuse plan run site --kind planned --yes" in hvfuse.err
    assert hvfuse.json("plan", "list")["plans"][0]["last_run"] is None


def test_a_plan_is_shown_with_what_keeps_its_vms_from_being_failed_over(hvfuse: CommandLine) -> None:
    (hvfuse.root / "hvfuse.toml").write_text(PLAN)
    assert [vm["error"] is None for vm in hvfuse.json("plan", "show", "site")["vms"]] == [False, False]
    assert hvfuse("plan", "show", "site") == 0
    assert "  pause: look" in hvfuse.out and "cannot be: " in hvfuse.out


def test_plans_go_on_with_what_was_read_before_a_fault_got_into_the_file(hvfuse: CommandLine) -> None:
    (hvfuse.root / ".hvfuse.toml.applied").write_text(PLAN)
    (hvfuse.root / "hvfuse.toml").write_text("[replication\n")
    assert [each["name"] for each in hvfuse.json("plan", "list")["plans"]] == ["site"]


def test_a_run_that_stopped_is_given_up_through_its_job_as_well(hvfuse: CommandLine) -> None:
    (hvfuse.root / "hvfuse.toml").write_text(PLAN.replace('pause = "look"', 'before = ["/no/such"]'))
    assert hvfuse("plan", "run", "site", "--test") == 1
    assert "not begun" in hvfuse.out and "there is no such command" in hvfuse.err
    assert hvfuse.json("plan", "cancel", "site")["run"]["state"] == "Cancelled"
    (hvfuse.root / "hvfuse.toml").write_text(PLAN)
    assert hvfuse("plan", "run", "site", "--test") == 1, "there is no such VM"
    assert hvfuse("plan", "run", "site", "--skip") == 17
    job = hvfuse.json("job", "list")["jobs"][-1]
    assert (job["kind"], job["state"]) == ("Recovery plan", "Suspended")
    assert hvfuse("job", "cancel", str(job["id"])) == 0
    assert hvfuse.json("plan", "report", "site")["state"] == "Cancelled"
