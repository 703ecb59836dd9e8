"""Promises of the judge, against a real server on this machine that answers as each test scripts it."""

import json
import math
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_server import Reply, answer_by, serving, stories_in
from errors import one_line_error
from jsonschema import Draft202012Validator
from scipy import stats

from conftest import MODEL
from evaluation import __main__ as evaluation
from evaluation.judge import judging as judge
from evaluation.judge.endpoint import Call, Endpoint
from evaluation.judge.prompts import GRADES, Prompt, comparison_question, grade_question, read_prompts
from evaluation.judge.verdict import Grading, Judgement, Pairing, cohens_kappa, mean_of, mean_share, questions
from runs.folder import Run

PROMPTS = [Prompt(f"Once there were {number} mice. They") for number in range(12)]
GRADE = {"assessment": "Fine.", "grammar": 7, "creativity": 1, "consistency": 10, "plot": 5}
QUESTION = grade_question(Prompt("Tom had a"), " ball.")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def quality(story: str) -> int:
    """Test stories tell how good they are."""
    return int(re.search(r"\d+", story)[0])


def told(*grades: int) -> list[str]:
    return [f" ate {grade} cakes, the {number}th time." for number, grade in enumerate(grades)]


GOOD = told(8, 9, 7, 8, 9, 6, 8, 9, 7, 8, 3, 5)
BAD = [story.replace("ate", "had") for story in told(5, 6, 2, 7, 6, 3, 5, 8, 4, 2, 4, 5)]


def judged(server, stories, prompts=PROMPTS, repeat=0.25, seed=0, **options):
    """A Judgement of stories by a server, and why calls failed."""
    endpoint = Endpoint("judge", server.url, **{"timeout": 10.0} | options)
    calls = {asked: Call(*call) for asked, call in questions(prompts, stories, repeat, seed).items()}
    answers, failed = endpoint.ask_all(calls, progress=False)
    assert answers.keys() | failed.keys() == calls.keys() and not answers.keys() & failed.keys()
    return Judgement(prompts, stories, answers), failed


def asked_once(reply, count: int = 1, **options):
    """What an endpoint makes of a server that always gives this reply, or those of a function."""
    calls = {number: Call(QUESTION, number) for number in range(count)}
    with serving(reply if callable(reply) else lambda request, number: reply) as server:
        endpoint = Endpoint("judge", server.url, **{"timeout": 10.0, "retries": 0} | options)
        answers, failed = endpoint.ask_all(calls, progress=False)
        return SimpleNamespace(answers=answers, failed=failed, requests=server.requests, endpoint=endpoint)


class TestQuestions:
    def test_only_the_form_that_was_asked_for_is_an_answer(self):
        comparison = comparison_question(Prompt("Tom", ("cake",)), " ran.", " sat.")
        worded = grade_question(Prompt("Tom", ("cake", "rain")), " ran.")
        both = {"assessment": "", "better": "tie"}
        for question, good in ((QUESTION, GRADE), (comparison, both), (worded, GRADE | {"words": 2})):
            validator = Draft202012Validator(question.schema)
            bad = [good | {"assessment": 3}, good | {"more": 1}, dict(list(good.items())[:-1]), [good], "fine", None, 7]
            bad += [good | {list(good)[-1]: value} for value in (0, 11, True, None, "7", 5.5, "3", [1], {})]
            for answer in (good, *bad):
                text = json.dumps(answer)
                assert validator.is_valid(answer) == (answer is good)
                if answer is good:
                    assert all(question.parse(form) == good for form in (text, f"```json\n{text}\n```\n", f" {text}\n"))
                else:
                    with pytest.raises(ValueError):
                        question.parse(text)
            for text in ("", "Sure! " + json.dumps(good), json.dumps(good)[:-1], json.dumps(good) * 2, "[" * 100_000):
                one_line_error(lambda text=text: question.parse(text), "it is not JSON")  # noqa: B023

    def test_the_judge_reads_the_beginning_the_story_and_the_words(self):
        prompt = Prompt("Tom sat down. {He}", ("cake", "rain"))
        graded = grade_question(prompt, " ran {away}.").messages
        assert [message["role"] for message in graded] == ["system", "user"]
        assert "Tom sat down. {He}*** ran {away}." in graded[1]["content"] and "cake, rain" in graded[1]["content"]
        assert '"words": 1 to 10' in graded[1]["content"] and "words" not in QUESTION.messages[1]["content"]
        compared = {"messages": comparison_question(prompt, " ran.", " slept\nlong.").messages}
        assert stories_in(compared) == [("story_1", " ran."), ("story_2", " slept\nlong.")]

    def test_demanded_words_go_before_the_beginning_and_are_found_in_any_form(self):
        prompt = Prompt("Once upon a time, the Rain", ("cake", "rain", "jump", "art"))
        assert prompt.text == "Words: cake, rain, jump, art\nStory: Once upon a time, the Rain"
        assert Prompt("Once").text == "Once"
        assert prompt.share_of_words(" came. Tom jumped at the party.") == 0.5
        assert prompt.share_of_words(" was cold. CAKES! She jumps for art.") == 1

    def test_prompts_that_ship_and_those_of_a_file(self, tmp_path):
        for name, words in (("beginnings", 0), ("words", 3)):
            shipped = read_prompts(name)
            assert len(set(shipped)) == len(shipped) >= 12 and {len(prompt.words) for prompt in shipped} == {words}
        path = tmp_path / "mine.txt"
        path.write_text("Once upon a time,\n\ncake, rain | Tom sat\n", encoding="utf-8")
        assert read_prompts(str(path)) == [Prompt("Once upon a time,"), Prompt("Tom sat", ("cake", "rain"))]
        for content, words in (("\n \n", "empty"), ("a\na", "twice"), ("cake | ", "no beginning")):
            path.write_text(content, encoding="utf-8")
            one_line_error(lambda: read_prompts(str(path)), "--prompts", words)
        path.write_bytes(b"\xff\xfe\xff")
        one_line_error(lambda: read_prompts(str(path)), "UTF-8")
        one_line_error(lambda: read_prompts("nowhere.txt"), "nowhere.txt", "no such file", error=FileNotFoundError)


class TestVerdict:
    def test_a_good_judge_s_preference_is_found(self):
        with serving(answer_by(quality)) as server:
            judgement, failed = judged(server, {"one": GOOD, "other": BAD})
        assert not failed
        found = judgement.preference("one", "other")
        assert (found.won, found.lost, found.tied) == (10, 1, 1)
        exact = stats.binomtest(10, 11).proportion_ci(method="exact")
        assert (found.share.value, found.share.low, found.share.high) == (10 / 11, *exact)
        assert found.p == stats.binomtest(10, 11).pvalue < 0.05
        turned = judgement.preference("other", "one")
        assert (turned.won, turned.lost, turned.tied) == (1, 10, 1)
        assert judgement.same_in_both_orders().value == 1 and judgement.shown_first().value == 0.5
        sentence = "one is preferred to other on 10 of 11 decided prompts: 91% (59% to 100%), p = 0.012; 1 tie."
        assert sentence in judge.report(judgement)
        assert sentence in judge.report(Judgement(PROMPTS, {"other": BAD, "one": GOOD}, judgement.answers))  # better one first

    def test_grades_and_their_difference_have_the_intervals_of_student(self):
        with serving(answer_by(quality)) as server:
            judgement, _ = judged(server, {"one": GOOD, "other": BAD})
        good, bad = (np.array([quality(story) for story in stories]) for stories in (GOOD, BAD))
        assert (judgement.grades("plot") == [good, bad]).all()
        table = judgement.table()
        assert list(table.index) == ["grammar", "creativity", "consistency", "plot", "all four"]
        low, high = stats.ttest_rel(good, bad).confidence_interval(0.95)
        assert table.loc["plot", "one - other"] == f"{(good - bad).mean():+.2f} ({low:+.2f} to {high:+.2f})"
        low, high = stats.t.interval(0.95, 11, good.mean(), stats.sem(good))
        assert table.loc["all four", "one"] == f"{good.mean():.2f} ({low:.2f} to {high:.2f})"

    def test_a_judge_that_takes_whatever_stands_first_finds_ties_alone(self):
        first = json.dumps({"assessment": "", "better": "1"})
        grade = answer_by(quality)
        with serving(lambda request, _: Reply(first) if len(stories_in(request)) == 2 else grade(request)) as server:
            judgement, _ = judged(server, {"one": GOOD, "other": BAD})
        found = judgement.preference("one", "other")
        assert (found.won, found.lost, found.tied, found.p) == (0, 0, 12, 1) and math.isnan(found.share.value)
        assert judgement.same_in_both_orders().value == 0 and judgement.shown_first().value == 1
        report = judge.report(judgement)
        assert "one and other are not distinguishable: 12 ties and no decided prompt." in report
        assert "the story shown first is picked: 100% (74% to 100%)" in report  # 12 prompts, however many answers

    def test_no_question_tells_whose_a_story_is_and_both_orders_are_asked(self):
        with serving(answer_by(quality)) as server:
            judged(server, {"zebra_run": GOOD, "yak_run": BAD}, repeat=0)
        assert not any(name in json.dumps(request) for request in server.requests for name in ("zebra", "yak"))
        pairs = Counter(tuple(story for _, story in stories_in(request)) for request in server.requests)
        expected = [(one, other) for one, other in zip(GOOD, BAD, strict=True) if one != other]
        assert pairs == Counter([*expected, *(pair[::-1] for pair in expected), *((story,) for story in GOOD + BAD)])

    def test_the_same_story_twice_is_a_tie_that_nobody_is_asked_for(self):
        asked = questions(PROMPTS, {"one": GOOD, "other": GOOD}, 0, 0)
        assert all(isinstance(one, Grading) for one in asked)
        assert Judgement(PROMPTS, {"one": GOOD, "other": GOOD}, {}).preference("one", "other").tied == 12

    def test_several_stories_of_a_prompt_count_as_one(self):
        stories = {"one": told(9, 2, 9, 2, 1, 5), "other": told(3, 3, 4, 3, 5, 5)}
        with serving(answer_by(quality)) as server:
            judgement, _ = judged(server, stories, PROMPTS[:2])
        found = judgement.preference("one", "other")
        assert (found.won, found.lost, found.tied) == (1, 1, 0)
        assert judgement.grades("plot").tolist() == [[19 / 3, 3], [4, 11 / 3]]

    def test_three_models_are_compared_pair_by_pair_and_p_values_know_it(self):
        with serving(answer_by(quality)) as server:
            judgement, _ = judged(server, {"a": GOOD, "b": BAD, "c": told(*range(1, 11), 1, 1)}, repeat=0)
        preference = judgement.preference("a", "b")
        assert preference.p == 3 * stats.binomtest(10, 11).pvalue
        assert preference.share.low == stats.binomtest(10, 11).proportion_ci(1 - 0.05 / 3).low
        assert "p = 0.035, corrected for 3 comparisons; 1 tie." in judge.report(judgement)
        assert list(judgement.table()) == ["a", "b", "c", "a - b", "a - c", "b - c"]

    def test_what_is_missing_counts_nowhere(self):
        stories = {"one": GOOD, "other": BAD}
        with serving(answer_by(quality)) as server:
            whole, _ = judged(server, stories)
        lost = {Pairing("one", "other", 0), Grading("one", 3)}
        some = Judgement(PROMPTS, stories, {asked: answer for asked, answer in whole.answers.items() if asked not in lost})
        assert some.verdict("one", "other", 0) is None and some.preference("one", "other").won == 9
        assert np.isnan(some.grades("plot")).tolist() == [[number == 3 for number in range(12)], [False] * 12]
        good, bad = (np.delete([quality(story) for story in told], 3) for told in (GOOD, BAD))
        low, high = stats.ttest_rel(good, bad).confidence_interval(0.95)
        assert some.table().loc["plot", "one - other"] == f"{(good - bad).mean():+.2f} ({low:+.2f} to {high:+.2f})"
        assert Judgement(PROMPTS, stories, {}).preference("one", "other") is None

    def test_words_are_searched_and_judged(self):
        prompts = [Prompt("Tom", ("cake", "rain")), Prompt("Lily", ("boat", "cold"))]
        stories = {"one": [" ate a cake in the rain.", " ran."], "other": [" sat.", " had a boat."]}
        with serving(answer_by(lambda story: 1 + 9 * ("cake" in story))) as server:
            judgement, _ = judged(server, stories, prompts)
        assert judgement.words_used().tolist() == [[1, 0], [0, 0.5]]
        assert judgement.grades("words").tolist() == [[10, 1], [1, 1]]
        assert {"words", "share of words used"} <= set(judgement.table().index)


class TestTrust:
    def test_a_judge_that_says_something_else_the_second_time_is_found_out(self):
        good = answer_by(quality)

        def fickle(request, number):
            answer = json.loads(good(request).content)
            if request["seed"] == 1:
                answer |= {key: GRADES[value % 10] for key, value in answer.items() if key in ("plot", "grammar")}
                answer |= {"better": {"1": "2", "2": "1", "tie": "tie"}[answer["better"]]} if "better" in answer else {}
            return Reply(json.dumps(answer))

        with serving(fickle) as server:
            judgement, _ = judged(server, {"one": GOOD, "other": BAD}, repeat=1.0)
        _, first, second = judgement.verdicts_twice().T
        assert Counter(first.tolist()) == {1: 10, -1: 1, 0: 1} and (second == -first).all()
        assert cohens_kappa(first, second) < 0
        _, grades, again = judgement.grades_twice()
        assert grades.shape == (24, 4) and ((grades == again).mean(axis=1) == 0.5).all()
        report = judge.report(judgement)
        assert "the same verdict: 8% (0% to 38%)" in report and "the same grade: 50% (21% to 79%), 0.50 apart" in report

    def test_a_share_is_asked_twice_always_the_same_one(self):
        stories = {"one": GOOD, "other": BAD}
        asked = questions(PROMPTS, stories, 0.25, 3)
        again = {one.number for one in asked if one.again}
        assert len(again) == 3 and again == {one.number for one in questions(PROMPTS, stories, 0.25, 3) if one.again}
        assert {seed for _, seed in asked.values()} == {3, 4} and all(seed == 3 + one.again for one, (_, seed) in asked.items())
        assert sum(one.again and isinstance(one, Grading) for one in asked) == 6
        assert not any(one.again for one in questions(PROMPTS, stories, 0, 0))

    def test_a_judge_that_always_says_the_same(self):
        with serving(answer_by(lambda story: 5)) as server:
            judgement, _ = judged(server, {"one": GOOD, "other": BAD})
        report = judge.report(judgement)
        assert "Cohen's kappa undefined" in report and "the same grade: 100%" in report
        assert judgement.table().loc["plot"].tolist() == ["5.00", "5.00", "+0.00"]  # no interval without variance

    def test_kappa(self):
        first = [1] * 25 + [0] * 25  # both yes 20 times, both no 15 times: 0.7 agree, 0.5 would by chance
        second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
        assert cohens_kappa(first, second) == pytest.approx(0.4)
        assert cohens_kappa(first, first) == 1 and math.isnan(cohens_kappa([1, 1], [1, 1])) and math.isnan(cohens_kappa([], []))
        one, other = np.random.default_rng(0).integers(1, 11, (2, 40))
        concordance = 2 * np.cov(one, other, bias=True)[0, 1] / (one.var() + other.var() + (one.mean() - other.mean()) ** 2)
        assert cohens_kappa(one, other, squared=True) == pytest.approx(concordance)  # Lin 1989: the two are the same

    def test_estimates_of_little(self):
        assert f"{mean_share([]):.0%} {mean_of([]):.2f} {mean_of([3, math.nan]):.2f}" == "– – 3.00"
        assert f"{mean_share([1, 1, 1]):.0%}" == "100% (29% to 100%)"


class TestEndpoint:
    def test_answers_that_cannot_be_used_are_told_and_the_rest_goes_on(self):
        replies = {
            0: (Reply("I like it!"), "invalid answer: it is not JSON"),
            1: (Reply(json.dumps(GRADE | {"plot": 11})), "its plot is '11'"),
            2: (Reply(None), "an empty answer"),
            3: (Reply(None, refusal="I can't."), "the judge refused"),
            4: (Reply("", finish_reason="content_filter"), "the judge refused"),
            5: (Reply('{"assess', finish_reason="length"), "more than 1000 tokens"),
            6: (Reply(body="<html>Welcome</html>"), "is not a chat completion"),
            7: (Reply(status=500, error="out of memory"), "answered 500"),
            8: (Reply(status=429, error="slow down"), "answered 429"),
            9: (Reply(status=400, error="the context is too short"), "answered 400"),
            10: (Reply(json.dumps(GRADE), seconds=3.0), "no answer in time"),
            11: (Reply(json.dumps(GRADE)), None),
            12: (Reply(body="[]"), "is not a chat completion"),
            13: (Reply(body="null"), "is not a chat completion"),
            14: (Reply(body='{"choices": ['), "is not a chat completion"),
            15: (Reply(body='{"choices": [{}]}'), "is not a chat completion"),
            16: (Reply(body='{"choices": [{"message": null}], "usage": {}}'), "is not a chat completion"),
            17: (Reply(body='{"choices": [{"message": {"content": [1]}}], "usage": 7}'), "an empty answer"),
            18: (Reply(body='{"choices": 5}'), "is not a chat completion"),
            19: (Reply(hangs_up=True), "the connection broke"),
        }
        done = asked_once(lambda request, _: replies[request["seed"]][0], len(replies), timeout=2.0)
        assert done.answers == {11: GRADE}
        for seed, (_, reason) in replies.items():
            assert reason is None or reason in done.failed[seed], done.failed
        assert "19 of 20 calls failed" in judge.failures(done.failed, 20)
        assert "7 x the reply is not a chat completion" in judge.failures(done.failed, 20)

    @pytest.mark.parametrize("status", [429, 500])
    def test_a_server_that_is_busy_is_asked_again_but_not_for_ever(self, status):
        busy = Reply(status=status, error="try later", headers={"Retry-After-Ms": "5"})
        done = asked_once(lambda request, number: Reply(json.dumps(GRADE)) if number == 2 else busy, retries=2)
        assert done.answers == {0: GRADE} and len(done.requests) == 3
        done = asked_once(busy, retries=2, temperature=0.5)
        assert len(done.requests) == 3 and f"answered {status}" in done.failed[0]

    def test_a_server_that_refuses_json_schema_is_asked_without_it_which_is_said_once(self, capsys):
        def old(request, _):
            refuses = "response_format" in request
            message = "'response_format' of type 'json_schema' is not supported"
            return Reply(status=400, error=message) if refuses else Reply(f"```json\n{json.dumps(GRADE)}\n```")

        done = asked_once(old, 20)
        assert len(done.answers) == 20 and not done.failed
        assert sum("response_format" in request for request in done.requests) <= 4  # those under way at once
        printed = capsys.readouterr().err
        assert printed.count("refuses response_format: answers are checked all the same") == 1
        done = asked_once(lambda request, _: old(request, _) if "response_format" in request else Reply("no"), 1, temperature=1.0)
        assert "it is not JSON" in done.failed[0]

    def test_a_server_that_knows_neither_seeds_nor_the_new_limit(self, capsys):
        def strict(request, _):
            unknown = {"seed", "max_completion_tokens"} & request.keys()
            return Reply(status=422, error=f"Extra inputs: {unknown.pop()}") if unknown else Reply(json.dumps(GRADE))

        done = asked_once(strict)
        assert done.answers and done.requests[-1]["max_tokens"] == 1000 and "response_format" in done.requests[-1]
        printed = capsys.readouterr().err
        assert "refuses seed" in printed and "refuses max_completion_tokens" in printed

    def test_what_is_sent(self):
        (request,) = asked_once(Reply(json.dumps(GRADE))).requests
        assert request["response_format"]["json_schema"] == {"name": "grades", "schema": QUESTION.schema, "strict": True}
        assert request["messages"] == QUESTION.messages and (request["model"], request["seed"]) == ("judge", 0)
        assert request["max_completion_tokens"] == 1000 and "temperature" not in request
        assert asked_once(Reply(json.dumps(GRADE)), temperature=0.0).requests[0]["temperature"] == 0

    def test_what_was_answered_is_not_asked_again_and_all_else_is(self, capsys):
        with serving(lambda *_: Reply(json.dumps(GRADE))) as server:

            def requests(question=QUESTION, seed=0, model="judge", **options):
                before = len(server.requests)
                answers, _ = Endpoint(model, server.url, **options).ask_all({0: Call(question, seed)}, progress=False)
                assert answers == {0: GRADE}
                return len(server.requests) - before

            assert requests() == 1 and requests() == 0
            assert requests(seed=1) == 1 and requests(model="other") == 1 and requests(temperature=0.0) == 1
            assert requests(grade_question(Prompt("Tom had a"), " cat.")) == 1
            assert requests() == 0
            endpoint = Endpoint("judge", server.url)
            for damage in ("", "{}", '{"answer": 3}', '{"answer": "{}"}'):
                endpoint._path(Call(QUESTION, 0)).write_text(damage)
                assert requests() == 1 and requests() == 0
            assert capsys.readouterr().err.count("is damaged") == 4

    def test_what_fails_is_asked_again(self):
        with serving(lambda request, number: Reply(json.dumps(GRADE) if number else "hm")) as server:
            endpoint = Endpoint("judge", server.url)
            assert endpoint.ask_all({0: Call(QUESTION, 0)}, progress=False)[0] == {}
            assert endpoint.ask_all({0: Call(QUESTION, 0)}, progress=False)[0] == {0: GRADE}

    @pytest.mark.parametrize("status, code, words", [
        (401, "invalid_api_key", "OPENAI_API_KEY"),
        (404, "model_not_found", "no model 'judge'"),
        (429, "insufficient_quota", "key"),
    ])  # fmt: skip
    def test_where_all_calls_would_fail_it_stops_and_keeps_what_it_has(self, status, code, words):
        error = Reply(status=status, error="no", code=code)
        calls = {number: Call(QUESTION, number) for number in range(9)}
        with serving(lambda request, number: error if number >= 3 else Reply(json.dumps(GRADE))) as server:
            endpoint = Endpoint("judge", server.url, retries=0, parallel=1)
            one_line_error(lambda: endpoint.ask_all(calls, progress=False), words, error=OSError)
            assert len(endpoint.missing(calls)) == 6 and len(server.requests) < 9

    def test_a_key_that_is_missing_or_wrong_or_right(self, monkeypatch):
        one_line_error(Endpoint("judge").check, "OPENAI_API_KEY is not set", "--base_url", error=PermissionError)
        with serving(answer_by(quality), key="secret") as server:
            one_line_error(lambda: Endpoint("judge", server.url).check(), "refuses the key", error=PermissionError)
            monkeypatch.setenv("OPENAI_API_KEY", "secret")
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            Endpoint("judge").check()
            assert not server.requests

    def test_a_server_that_is_not_there_and_one_without_a_list_of_models(self):
        for models in (None, "<html>Welcome</html>", "[]", "null", "{", {"error": "none"}):
            with serving(answer_by(quality), models=models) as server:
                Endpoint("judge", server.url).check()
        gone = Endpoint("judge", server.url, timeout=2)
        one_line_error(gone.check, "no judge answers", "--base_url", error=ConnectionError)


@pytest.fixture
def two_runs(tiny_run, tmp_path):
    """The words of the command line for two runs that write different stories."""
    shutil.copytree(Run(tiny_run).folder, Run("other_run").folder)
    saved = Run(tiny_run).load("model.pth", {"model"})
    noise = torch.Generator().manual_seed(0)
    changed = {name: weight + 0.3 * torch.randn(weight.shape, generator=noise) for name, weight in saved["model"].items()}
    Run("other_run").save("model.pth", saved | {"model": changed})
    (tmp_path / "prompts.txt").write_text("Tom had\nLily saw\na, so | Ben\n", encoding="utf-8")
    return [tiny_run, "other_run", "--model", "judge", "--prompts", str(tmp_path / "prompts.txt"), "--repeat", "0.3"]


class TestTerminal:
    def test_what_was_planned_is_asked_and_a_second_run_asks_nothing(self, two_runs, capsys, tmp_path):
        with serving(answer_by(lambda story: 1 + len(story) % 10)) as server:
            words = [*two_runs, "--base_url", server.url, "--yes", "--price_per_million", "1", "2"]
            words += ["--save", str(tmp_path / "all.json")]
            evaluation.run(["judge", *words])
            first = capsys.readouterr().out
            asked = len(server.requests)
            assert asked == 16 and "16 calls: 8 grade a story, 8 compare two; 4 of them for a second time" in first
            expected = re.search(r"about ([\d,]+) tokens to read and ([\d,]+) to write \(at most ([\d,]+)\)", first)
            read, written, most = (int(number.replace(",", "")) for number in expected.groups())
            assert (written, most) == (16 * 120, 16_000)
            counted = int(re.search(r"read ([\d,]+) tokens and", first)[1].replace(",", ""))
            assert counted < read < 1.5 * counted  # the server of the test does not count the schema
            assert f"about {(read + 2 * written) / 1e6:.4f}, and at most {(read + 2 * most) / 1e6:.4f}" in first
            evaluation.run(["judge", *words])
            second = capsys.readouterr().out
            assert len(server.requests) == asked and "16 are answered already, 0 are to be asked" in second
            assert second.split("\n\n", 1)[1] == first.split("\n\n", 1)[1]
        saved = json.loads((tmp_path / "all.json").read_text())
        assert len(saved["answers"]) == 16 and saved["stories"].keys() == {"tiny", "other_run"}
        assert saved["stories"]["tiny"] != saved["stories"]["other_run"]

    def test_a_judgement_that_is_kept_needs_no_server_and_one_that_is_not_says_so(self, two_runs, capsys):
        with serving(answer_by(lambda story: 1 + len(story) % 10)) as server:
            words = [*two_runs, "--base_url", server.url, "--timeout", "2", "--yes"]
            evaluation.run(["judge", *words])
            first = capsys.readouterr().out
        evaluation.run(["judge", *words])
        again = capsys.readouterr().out
        assert "0 are to be asked" in again and again.split("\n\n", 1)[1] == first.split("\n\n", 1)[1]
        more = [*words, "--stories_per_prompt", "2"]
        one_line_error(lambda: evaluation.run(["judge", *more]), "no judge answers", error=ConnectionError)
        evaluation.run(["judge", *words])
        assert capsys.readouterr().out.endswith(again.split("\n\n", 1)[1])

    def test_what_was_paid_for_is_kept_when_the_server_fails_halfway(self, two_runs, capsys):
        good = answer_by(lambda story: 1 + len(story) % 10)
        bad = [Reply("wonderful"), Reply(None, refusal="no"), Reply(hangs_up=True), Reply(status=500), Reply(seconds=4.0)]
        with serving(lambda request, number: good(request) if number < 9 else bad[number % len(bad)]) as server:
            words = [*two_runs, "--base_url", server.url, "--timeout", "1.5", "--retries", "0", "--yes"]
            evaluation.run(["judge", *words])
            assert "7 of 16 calls failed" in capsys.readouterr().out
            server.judge = good
            evaluation.run(["judge", *words])
            assert "9 are answered already, 7 are to be asked" in capsys.readouterr().out and len(server.requests) == 16 + 7

    def test_models_go_on_from_the_beginning_and_the_instruction_is_no_part_of_the_story(self, two_runs):
        prompts = read_prompts(two_runs[5])
        stories = judge.write_stories(two_runs[:2], prompts, rounds=2)
        assert [len(told) for told in stories.values()] == [6, 6] and stories["tiny"][0] != stories["tiny"][3]
        assert not any(text in story for told in stories.values() for story in told for text in ("Words:", "Story:", "Tom had"))
        assert stories == judge.write_stories(two_runs[:2], prompts, rounds=2)

    def test_nothing_is_asked_without_consent(self, two_runs, monkeypatch, capsys):
        with serving(answer_by(quality)) as server:
            words = [*two_runs, "--base_url", server.url]
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
            one_line_error(lambda: evaluation.run(["judge", *words]), "--yes")
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
            monkeypatch.setattr("builtins.input", lambda question: "n")
            evaluation.run(["judge", *words])
            assert not server.requests and "are to be asked" in capsys.readouterr().out

    def test_a_stopped_run_goes_on(self, two_runs, monkeypatch):
        ask = Endpoint.ask
        with serving(answer_by(lambda story: 1 + len(story) % 10)) as server:
            words = [*two_runs, "--base_url", server.url, "--yes", "--parallel", "1"]

            def stopped(self, call):
                if len(server.requests) == 5:
                    raise KeyboardInterrupt
                return ask(self, call)

            monkeypatch.setattr(Endpoint, "ask", stopped)
            with pytest.raises(KeyboardInterrupt):
                evaluation.run(["judge", *words])
            monkeypatch.setattr(Endpoint, "ask", ask)
            assert len(server.requests) == 5
            evaluation.run(["judge", *words])
            assert len(server.requests) == 16

    def test_key_and_server_are_tried_before_a_story_is_written(self, two_runs, monkeypatch):
        monkeypatch.setattr(judge, "generate", lambda *_, **__: pytest.fail("a story was written"))
        one_line_error(lambda: evaluation.run(["judge", *two_runs]), "OPENAI_API_KEY is not set", error=PermissionError)
        with serving(answer_by(quality)) as server:
            pass
        words = [*two_runs, "--base_url", server.url, "--timeout", "2"]
        one_line_error(lambda: evaluation.run(["judge", *words]), "no judge answers", error=ConnectionError)

    def test_a_judge_of_nonsense_alone(self, two_runs, capsys):
        with serving(lambda *_: Reply("wonderful")) as server:
            words = ["judge", *two_runs, "--base_url", server.url, "--yes"]
            one_line_error(lambda: evaluation.run(words), "gave no valid answer")
        assert "16 of 16 calls failed" in capsys.readouterr().out

    def test_one_run_alone_is_graded(self, two_runs, capsys):
        with serving(answer_by(lambda story: 3)) as server:
            evaluation.run(["judge", two_runs[0], *two_runs[2:], "--base_url", server.url, "--yes"])
        shown = capsys.readouterr().out
        assert "4 calls: 4 grade a story, 0 compare two" in shown and "3.00" in shown and "order" not in shown

    @pytest.mark.parametrize("words, told", [
        (["tiny", "tiny"], "named twice"),
        (["tiny", "--repeat", "2"], "--repeat 2.0"),
        (["tiny", "--parallel", "0"], "--parallel 0"),
        (["tiny", "--timeout", "nan"], "--timeout nan"),
        (["tiny", "--retries", "-1"], "--retries -1"),
        (["tiny", "--price_per_million", "1", "2", "3"], "one price"),
        (["tiny", "--save", "/no/such/folder/a.json"], "no folder"),
    ])  # fmt: skip
    def test_options_that_make_no_sense(self, words, told, capsys):
        with pytest.raises(SystemExit, match="2"):
            evaluation.main(["judge", *words, "--model", "judge"])
        assert told in capsys.readouterr().err

    def test_without_the_package_openai(self, two_runs, monkeypatch):
        monkeypatch.setitem(sys.modules, "openai", None)
        monkeypatch.delitem(sys.modules, "evaluation.judge.endpoint")
        one_line_error(lambda: evaluation.run(["judge", *two_runs]), "pip install openai", error=ImportError)

    def test_a_context_that_is_too_short_for_a_prompt(self, two_runs):
        with serving(answer_by(quality)) as server:
            words = [*two_runs[:4], "--base_url", server.url]
            one_line_error(lambda: evaluation.run(["judge", *words]), f"max_seq_len is {MODEL.max_seq_len}")
