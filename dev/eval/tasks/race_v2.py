"""
RACE's prompt as the harness had it up to 0.4.11, and so in the paper: of a question that ends in a gap,
"  _  .", the article's solved problems show its last five characters before the answer, and not the question.
"""
from lm_eval.tasks.race.preprocess_race import doc_to_choice, doc_to_target, get_answer_option, last_problem, process_ast  # noqa: F401


def doc_to_text(doc):
    text = "Article: " + doc["article"] + "\n\n"
    for problem in process_ast(doc["problems"])[:-1]:
        if problem["question"][-6:] == "  _  .":
            text += problem["question"][-5:] + get_answer_option(problem) + "\n"
        else:
            text += "Question: " + problem["question"] + "\nAnswer: " + get_answer_option(problem) + "\n"
    return text + last_problem(doc)["question"]
