/** Something that is being fetched: the last good value stays in sight until the next one has come. */

export class Load<T> {
  value: T | null = $state.raw(null);
  error: Error | null = $state.raw(null);
  pending: boolean = $state(false);
  #turn = 0;

  /** Wait for `promise`; an answer that a later call has overtaken is dropped. */
  async from(promise: Promise<T>): Promise<void> {
    const turn = ++this.#turn;
    this.pending = true;
    try {
      const value = await promise;
      if (turn === this.#turn) [this.value, this.error] = [value, null];
    } catch (error) {
      if (turn === this.#turn && !(error instanceof DOMException)) this.error = error as Error;
    } finally {
      if (turn === this.#turn) this.pending = false;
    }
  }

  /** Forget the value, and whatever is on its way. */
  clear(): void {
    this.#turn++;
    [this.value, this.error, this.pending] = [null, null, false];
  }
}
