#include "client/load_plot.h"

#include <math.h>
#include <stdlib.h>

/* In pixels. */
enum {
    WIDTH = 1080,
    HEIGHT = 420,
    CHARTS = 3,
    CHART_TOP = 76,
    CHART_HEIGHT = 270,
    CHART_WIDTH = 270,
    CHART_LEFT = 68, /* of the first */
    CHART_STEP = 350,
    LEGEND_STEP = 46,
    TICKS = 5, /* of the vertical axis, about */
};

struct series {
    const char *name, *colour;
    size_t offset; /* of a double in struct load_figures */
};

struct chart {
    const char *title;
    struct series series[2];
    size_t series_count;
};

#define FIGURE(member) offsetof(struct load_figures, member)

/* Colours that the colour-blind can tell apart (Okabe and Ito). */
static const struct chart charts[CHARTS] = {
    {"time to first token, ms", {{"p50", "#0072b2", FIGURE(ttft.p50_ms)}, {"p99", "#d55e00", FIGURE(ttft.p99_ms)}}, 2},
    {"time between tokens, ms", {{"p50", "#0072b2", FIGURE(itl.p50_ms)}, {"p99", "#d55e00", FIGURE(itl.p99_ms)}}, 2},
    {"throughput, tokens/s", {{"out", "#009e73", FIGURE(tokens_out_per_s)}}, 1},
};

struct plot {
    FILE *out;
    const struct load_figures **figures; /* in rising order of load */
    size_t count;
};

static double figure(const struct load_figures *figures, const struct series *series) {
    return *(const double *)((const char *)figures + series->offset);
}

static void print_text(FILE *out, const char *text) {
    for (const char *c = text; *c; c++) {
        if (*c == '<')
            fputs("&lt;", out);
        else if (*c == '>')
            fputs("&gt;", out);
        else if (*c == '&')
            fputs("&amp;", out);
        else
            putc((unsigned char)*c < 0x20 || (unsigned char)*c > 0x7e ? '?' : *c, out); /* XML takes UTF-8 alone */
    }
}

static void draw_text(FILE *out, double x, double y, const char *anchor, const char *text) {
    fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    print_text(out, text);
    fputs("</text>\n", out);
}

static void draw_line(FILE *out, double x1, double y1, double x2, double y2, const char *colour) {
    fprintf(out, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x1, y1, x2, y2, colour);
}

/* A step of 1, 2 or 5 and zeros that gives about TICKS of them up to `max`. */
static double tick_step(double max) {
    double raw = max / TICKS, power = pow(10, floor(log10(raw)));
    double digit = raw / power;
    return power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
}

static double x_of(const struct plot *plot, double left, double load) {
    double low = log(plot->figures[0]->load), high = log(plot->figures[plot->count - 1]->load);
    return high > low ? left + CHART_WIDTH * (log(load) - low) / (high - low) : left + CHART_WIDTH / 2.0;
}

static double y_of(double top_value, double value) {
    return CHART_TOP + CHART_HEIGHT * (1 - value / top_value);
}

static void draw_axes(const struct plot *plot, double left, double top_value, double step, const char *load_name) {
    FILE *out = plot->out;
    char label[32];
    const double bottom = CHART_TOP + CHART_HEIGHT;
    for (int i = 0; i * step <= top_value * 1.0001; i++) {
        double y = y_of(top_value, i * step);
        draw_line(out, left, y, left + CHART_WIDTH, y, i ? "#dddddd" : "#444444");
        snprintf(label, sizeof label, "%g", i * step);
        draw_text(out, left - 7, y + 4, "end", label);
    }
    double free_from = 0;
    for (size_t i = 0; i < plot->count; i++) {
        double x = x_of(plot, left, plot->figures[i]->load);
        int characters = snprintf(label, sizeof label, "%.4g", plot->figures[i]->load);
        double half = (7.0 * characters + 4) / 2; /* what the label needs, about */
        draw_line(out, x, bottom, x, bottom + 4, "#444444");
        if (x - half < free_from)
            continue;
        draw_text(out, x, bottom + 18, "middle", label);
        free_from = x + half;
    }
    draw_text(out, left + CHART_WIDTH / 2.0, bottom + 38, "middle", load_name);
}

static void draw_series(const struct plot *plot, double left, double top_value, const struct series *series) {
    FILE *out = plot->out;
    fprintf(out, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"", series->colour);
    for (size_t i = 0; i < plot->count; i++)
        fprintf(out, "%s%.1f,%.1f", i ? " " : "", x_of(plot, left, plot->figures[i]->load),
                y_of(top_value, figure(plot->figures[i], series)));
    fputs("\"/>\n", out);
    for (size_t i = 0; i < plot->count; i++)
        fprintf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n",
                x_of(plot, left, plot->figures[i]->load), y_of(top_value, figure(plot->figures[i], series)),
                series->colour);
}

static void draw_chart(const struct plot *plot, const struct chart *chart, double left, const char *load_name) {
    double max = 0;
    for (size_t i = 0; i < plot->count; i++)
        for (size_t s = 0; s < chart->series_count; s++)
            max = fmax(max, figure(plot->figures[i], &chart->series[s]));
    max = max > 0 ? max : 1;
    double step = tick_step(max), top_value = ceil(max / step) * step;

    fprintf(plot->out, "<g>\n<text x=\"%.1f\" y=\"%d\" font-weight=\"bold\">%s</text>\n", left, CHART_TOP - 14,
            chart->title);
    draw_axes(plot, left, top_value, step, load_name);
    for (size_t s = 0; s < chart->series_count; s++) {
        double legend = left + CHART_WIDTH - (double)(chart->series_count - s) * LEGEND_STEP;
        draw_series(plot, left, top_value, &chart->series[s]);
        fprintf(plot->out, "<rect x=\"%.1f\" y=\"%d\" width=\"10\" height=\"10\" fill=\"%s\"/>\n", legend,
                CHART_TOP - 24, chart->series[s].colour);
        draw_text(plot->out, legend + 14, CHART_TOP - 14, "start", chart->series[s].name);
    }
    fputs("</g>\n", plot->out);
}

static int by_load(const void *a, const void *b) {
    double difference = (*(const struct load_figures *const *)a)->load - (*(const struct load_figures *const *)b)->load;
    return (difference > 0) - (difference < 0);
}

void load_plot(FILE *out, const char *title, const char *load_name, const struct load_figures *figures, size_t count) {
    struct plot plot = {.out = out, .count = count};
    plot.figures = calloc(count, sizeof *plot.figures);
    if (!plot.figures)
        abort(); /* as for calls: see rpc.c */
    for (size_t i = 0; i < count; i++)
        plot.figures[i] = &figures[i];
    qsort(plot.figures, count, sizeof *plot.figures, by_load);

    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
            WIDTH, HEIGHT, WIDTH, HEIGHT);
    draw_text(out, WIDTH / 2.0, 28, "middle", title);
    for (size_t i = 0; i < CHARTS; i++)
        draw_chart(&plot, &charts[i], CHART_LEFT + (double)i * CHART_STEP, load_name);
    fputs("</svg>\n", out);
    free(plot.figures);
}
