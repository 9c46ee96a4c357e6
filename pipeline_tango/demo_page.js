// The two parts of the demo's page that Gradio has no component for. Each is the `js_on_load` of a `gr.HTML`, from its
// line of dashes to the next, and has `element`, `props`, `trigger` and `watch`.

// ---- region: a waveform on which a region is marked. props.value: {peaks, seconds, start, end}
const draw = () => {
    const canvas = element.querySelector("canvas"), value = props.value;
    if (!canvas) return;
    const width = canvas.width = canvas.clientWidth * devicePixelRatio;
    const height = canvas.height = canvas.clientHeight * devicePixelRatio;
    const context = canvas.getContext("2d");
    if (!value?.peaks) return;
    const styles = getComputedStyle(element);
    const x = (seconds) => (seconds / value.seconds) * width;
    if (value.end > value.start) {
        context.fillStyle = styles.getPropertyValue("--color-accent");
        context.globalAlpha = 0.35;
        context.fillRect(x(value.start), 0, x(value.end) - x(value.start), height);
        context.globalAlpha = 1;
    }
    context.fillStyle = styles.color;
    const loudest = Math.max(...value.peaks, 1e-6), step = width / value.peaks.length;
    value.peaks.forEach((peak, i) => {
        const tall = Math.max((peak / loudest) * height * 0.9, 1);
        context.fillRect(i * step, (height - tall) / 2, Math.max(step * 0.7, 1), tall);
    });
};
let begun = null;
const secondsAt = (event) => {
    const box = element.querySelector("canvas").getBoundingClientRect();
    const part = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    return Math.round(part * props.value.seconds * 100) / 100;
};
const mark = (event) => {
    const [start, end] = [begun, secondsAt(event)].sort((a, b) => a - b);
    props.value = { ...props.value, start, end };
    requestAnimationFrame(draw);
};
element.addEventListener("pointerdown", (event) => {
    if (event.target.tagName !== "CANVAS" || !props.value?.peaks) return;
    event.preventDefault();
    begun = secondsAt(event);
    mark(event);
});
window.addEventListener("pointermove", (event) => {
    if (begun !== null) mark(event);
});
window.addEventListener("pointerup", (event) => {
    if (begun === null) return;
    mark(event);
    begun = null;
    trigger("input");
});
watch("value", draw);
new ResizeObserver(draw).observe(element);
draw();

// ---- stream: plays what is generated while it is. props.value: {run, sampling_rate, parts: [base64 of int16, ...]}
let context = null, run = null, numPlayed = 0, end = 0;
const show = () => {
    const button = element.querySelector("button"), made = element.querySelector("span");
    if (!button) return;
    button.disabled = context === null;
    button.textContent = context?.state === "suspended" ? "Play" : "Pause";
    made.textContent = props.value?.parts ? `${props.value.seconds.toFixed(1)} s are there` : "";
    element.dataset.scheduled = end.toFixed(3);
};
const play = () => {
    const value = props.value;
    if (value?.run !== run) {
        context?.close();
        [context, run, numPlayed, end] = [null, value?.run ?? null, 0, 0];
    }
    if (value?.parts && context === null) {
        context = new AudioContext();
        context.onstatechange = show;
    }
    for (; numPlayed < (value?.parts?.length ?? 0); numPlayed++) {
        const bytes = Uint8Array.from(atob(value.parts[numPlayed]), (character) => character.charCodeAt(0));
        const samples = new Int16Array(bytes.buffer);
        const buffer = context.createBuffer(1, samples.length, value.sampling_rate);
        buffer.getChannelData(0).set(Float32Array.from(samples, (sample) => sample / 32768));
        const source = new AudioBufferSourceNode(context, { buffer });
        source.connect(context.destination);
        end = Math.max(end, context.currentTime + 0.05);
        source.start(end);
        end += buffer.duration;
    }
    show();
};
element.addEventListener("click", async (event) => {
    if (event.target.tagName !== "BUTTON" || context === null) return;
    await (context.state === "suspended" ? context.resume() : context.suspend());
    show();
});
watch("value", play);
show();
