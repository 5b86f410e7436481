/*
README.md of an exported model, which Hugging Face calls its card: the model's shape, what it was trained on,
its losses, how it is loaded.

Of the data the card has the files' names, without their folders. The losses are those of the run's log.jsonl,
beside the checkpoint's folder: the training loss as the mean over the last steps, and each domain's
validation loss. A checkpoint that was copied away from its run has no losses in its card. A model by others
has nothing on its training.

Errors: a log that is there and cannot be read stops the export; its unreadable rows are passed over.
*/
#ifndef MODEL_CARD_H
#define MODEL_CARD_H

#include "llmc/files/logger.h"
#include "llmc/files/run_folder.h"
#include "llmc/files/vocabulary.h"
#include "llmc/run/options.h"
#include "llmc/step.h"

typedef struct {
    const char *name; // of the exported folder
    const Config *config;
    const Options *options;
    const RunState *state;  // NULL: of the training nothing is known
    const char *checkpoint; // the folder that is exported
    int is_bf16;
} ModelCard;

static inline void card_experts(const Config *c, FILE *file) {
    const Router *r = &c->router;
    long long active = (long long)config_params(c, r->active);
    if (router_merges(r->method)) {
        fprintf(file,
                ", of which a token meets %lld: all experts, merged into one |\n"
                "| experts per layer | %d, merged anew every %d tokens |\n",
                active, r->experts, r->segment);
    } else {
        fprintf(file,
                ", of which %lld are active per token |\n"
                "| experts per layer | %d, %d active%s; granularity %d |\n",
                active, r->experts, r->active, router_row(r->method)->leaves_number_open ? " on average" : "",
                c->granularity);
    }
    fprintf(file, "| router | %s |\n", router_name(r->method));
}

static inline void card_shape(const ModelCard *card, FILE *file) {
    const Config *c = card->config;
    fprintf(file, "| | |\n|---|---|\n| parameters | %lld", (long long)config_params(c, c->router.experts));
    if (router_has_experts(c->router.method)) {
        card_experts(c, file);
    } else {
        fputs(" |\n", file);
    }
    fprintf(file,
            "| layers | %d |\n| hidden size | %d |\n| heads | %d, %d for keys and values, of %d |\n"
            "| feed-forward width | %d |\n| vocabulary | %d |\n| longest context in training | %d tokens |\n"
            "| weights | %s |\n\n",
            c->layers, c->hidden, c->heads, c->kv_heads, c->head_size, c->ffn, c->vocab_size, c->max_seq_len,
            card->is_bf16 ? "bf16, rounded from fp32" : "fp32");
}

// ----------------------------------------------------------------------------
// training

// "data/pile/train_*.bin:0.7,b.bin" -> `train_*.bin:0.7`, `b.bin`: folders are the user's business
static inline void card_data(FILE *file, const char *list) {
    for (const char *before = " ", *end; list != NULL; before = ", ", list = end) {
        size_t size = strcspn(list, ",");
        const char *name = list + size;
        end = *name == ',' ? name + 1 : NULL;
        while (name > list && name[-1] != '/') {
            name--;
        }
        fprintf(file, "%s`%.*s`", before, (int)(list + size - name), name);
    }
}

enum { CARD_STEPS = 100 }; // of which the training loss is the mean

// what a run's log says of its model after `step` steps
typedef struct {
    int64_t step;
    int64_t steps;     // training steps in the mean
    double loss;       // their sum, then their mean
    int64_t validated; // the last validation was after so many steps; -1: there was none
    FILE *rows;        // of its table
    char *text;
    size_t size;
} CardLosses;

// domains are named by data that others made: what would end a table's cell does not go into it
static inline void card_cell(FILE *file, const char *text) {
    for (; *text != '\0'; text++) {
        fputc((unsigned char)*text < ' ' || *text == '|' || *text == '<' ? ' ' : *text, file);
    }
}

static inline void card_read_validation(CardLosses *losses, int64_t step, double loss, const char *domain) {
    if (step > losses->validated) { // an earlier one is forgotten
        losses->validated = step;
        fclose(losses->rows);
        free(losses->text);
        losses->rows = check_memstream(&losses->text, &losses->size);
    }
    fputs("| ", losses->rows);
    card_cell(losses->rows, domain);
    fprintf(losses->rows, " | %.4f |\n", loss);
}

// a row of log.jsonl: the training step i says i, a validation after n steps n
static inline void card_read_row(CardLosses *losses, const Json *row) {
    const Json *domain = json_get(row, "domain");
    int64_t step = -1;
    double loss;
    if (json_get(row, "step") == NULL || !json_int64(json_get(row, "step"), &step) || step < 0) {
        return;
    }
    if (json_get(row, "lm_loss") != NULL && json_double(json_get(row, "lm_loss"), &loss) &&
        step < losses->step && step >= losses->step - CARD_STEPS) {
        losses->steps++;
        losses->loss += loss;
    }
    if (json_get(row, "val_loss") != NULL && json_double(json_get(row, "val_loss"), &loss) &&
        domain != NULL && domain->type == JSON_STRING && step <= losses->step && step >= losses->validated) {
        card_read_validation(losses, step, loss, domain->text);
    }
}

static inline void card_read_log(CardLosses *losses, const char *path) {
    JsonArena arena;
    size_t size = 0;
    char *text = log_read(path, &size);
    json_arena_init(&arena);
    for (char *line = text, *end;
         text != NULL && (end = (char *)memchr(line, '\n', (size_t)(text + size - line))); line = end + 1) {
        char error[128];
        json_arena_reset(&arena);
        const Json *row = json_parse(line, (size_t)(end - line), &arena, error, sizeof(error));
        if (row != NULL && row->type == JSON_OBJECT) {
            card_read_row(losses, row);
        }
    }
    json_arena_free(&arena);
    free(text);
}

// the log of the run that the checkpoint's folder lies in
static inline void card_losses(const ModelCard *card, FILE *file) {
    CardLosses losses = {card->state->step, 0, 0.0, -1, NULL, NULL, 0};
    char home[PATH_SIZE], name[PATH_SIZE], log[PATH_SIZE];
    split_path(home, name, card->checkpoint);
    check_format(log, sizeof(log), "%.2000s/log.jsonl", home);
    losses.rows = check_memstream(&losses.text, &losses.size);
    card_read_log(&losses, log);
    fclose(losses.rows);
    if (losses.steps > 0) {
        fprintf(file, "Training loss, mean of the last %lld steps: %.4f nats per token.\n",
                (long long)losses.steps, losses.loss / (double)losses.steps);
    }
    if (losses.validated >= 0) {
        fprintf(file, "\n| validation loss after %lld steps | nats per token |\n|---|---|\n%s",
                (long long)losses.validated, losses.text);
    }
    fputs(losses.steps > 0 || losses.validated >= 0 ? "\n" : "", file);
    free(losses.text);
}

static inline void card_training(const ModelCard *card, FILE *file) {
    const Options *o = card->options;
    if (card->state == NULL) {
        return;
    }
    fprintf(file,
            "## Training\n\n%lld steps, %lld tokens (sequences of %lld), of:", (long long)card->state->step,
            (long long)(card->state->sequences * o->seq_len), (long long)o->seq_len);
    card_data(file, o->train_data);
    fprintf(file, ".\nAdamW, learning rate %g to %g, weight decay %g, seed %lld.\n\n", o->lr, o->lr_min,
            o->weight_decay, (long long)o->seed);
    card_losses(card, file);
}

// ----------------------------------------------------------------------------
// use

static inline void card_code(const ModelCard *card, FILE *file) {
    int moe = router_has_experts(card->config->router.method);
    const char *trust = moe ? ", trust_remote_code=True" : "";
    fprintf(file,
            "## Use\n\n"
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "folder = \"%s\"\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder%s)\n"
            "model = AutoModelForCausalLM.from_pretrained(folder%s)\n"
            "prompt = tokenizer(tokenizer.bos_token + \"Once upon a time\", return_tensors=\"pt\")\n"
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))\n"
            "```\n\n"
            "Every text in training began with `" TOKENIZER_EOT
            "`, so a prompt should; the tokenizer does not "
            "add it.\n",
            card->name, trust, trust);
    if (moe) {
        fputs("transformers (4 or 5) asks for `trust_remote_code` because the experts' code, "
              "`modeling_remoe.py`, lies in this folder.\n",
              file);
    }
}

static inline void card_use(const ModelCard *card, FILE *file) {
    const Router *r = &card->config->router;
    card_code(card, file);
    if (router_row(r->method)->for_one_token != r->method) {
        fprintf(
            file,
            "\nThe experts choose among all tokens of a batch (%s). A token that is being generated has no "
            "such batch:\nwhile generating, each token takes its %d best experts (%s). On whole texts each "
            "token sees later ones through\nthe experts' choice: losses cannot be compared with other "
            "routers'.\n",
            router_name(r->method), r->active, router_name(router_row(r->method)->for_one_token));
    }
    if (router_merges(r->method)) {
        fprintf(
            file,
            "\nA whole text's first %d tokens are routed by their own mean, so each sees something of those "
            "after it:\nlosses that count them are a little too low.\n",
            r->segment);
    }
    fprintf(file,
            "\nremoe.c reads the folder too: `./train_remoe --load %s --sample \"Once upon a time\"`.\n",
            card->name);
}

// ----------------------------------------------------------------------------
// all of it

// a sentence
static inline const char *card_kind(const Router *r) {
    return !router_has_experts(r->method) ? "A dense language model, LLaMA's architecture."
           : router_merges(r->method)
               ? "A mixture-of-experts language model: LLaMA's layers, their feed-forward part replaced by "
                 "experts which a\nrouter merges into one for each segment of the text."
               : "A mixture-of-experts language model: LLaMA's layers, their feed-forward part replaced by "
                 "experts among which a\nrouter chooses for each token.";
}

static inline void model_card_write(const ModelCard *card, FILE *file) {
    const Router *r = &card->config->router;
    fprintf(file,
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- %s\n---\n\n# %s\n\n"
            "%s Trained with remoe.c.\n\n",
            router_has_experts(r->method) ? "remoe\n- mixture-of-experts" : "llama", card->name,
            card_kind(r));
    card_shape(card, file);
    card_training(card, file);
    card_use(card, file);
}

#endif
