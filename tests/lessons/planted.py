"""How the banks of planted mistakes are written down."""

MISTAKES = []  # (exercise, wrong answer, phrase that its own diagnosis must contain)


def mistake(exercise, phrase):
    def keep(answer):
        MISTAKES.append((exercise, answer, phrase))
        return answer

    return keep
