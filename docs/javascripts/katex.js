// Equations are drawn on every page that the theme shows, also without a reload.
document$.subscribe(({ body }) => {
  renderMathInElement(body, { delimiters: [{ left: "\\[", right: "\\]", display: true }, { left: "\\(", right: "\\)", display: false }] })
})
